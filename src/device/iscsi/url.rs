//! `iscsi://[user[%password]@]portal[:port]/target/lun`, the form that libiscsi and QEMU have.
//!
//! A password in a command line is seen by everybody on the machine: `LUNFS_ISCSI_PASSWORD` in the environment does
//! as well. No text of LunFS ever contains it; [`Target`] prints without user and password.

use std::fmt;

use thiserror::Error;

pub const SCHEME: &str = "iscsi://";
const PASSWORD_VARIABLE: &str = "LUNFS_ISCSI_PASSWORD";
const PORT: u16 = 3260;
/// What libiscsi takes at most.
const NAME_BYTES_MAX: usize = 255;

/// What is wrong with it; none of the texts repeats what could be a password.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{0}; the form is iscsi://[user[%password]@]portal[:port]/target/lun")]
pub struct UrlError(&'static str);

/// A logical unit of a target, and how to log in.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    /// Host name, IPv4 address, or IPv6 address in brackets.
    pub host: String,
    pub port: u16,
    pub name: String,
    pub lun: u16,
    pub user: Option<String>,
    pub password: Option<String>,
}

impl Target {
    /// Is it meant for this backend at all?
    pub fn is_meant(spec: &str) -> bool {
        spec.starts_with(SCHEME)
    }

    pub fn parse(spec: &str) -> Result<Target, UrlError> {
        let rest = spec.strip_prefix(SCHEME).ok_or(UrlError("this is no iSCSI address"))?;
        let mut parts = rest.split('/');
        let (Some(authority), Some(name), Some(lun), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(UrlError("there must be a portal, a target and a LUN"));
        };
        let (login, portal) = match authority.rsplit_once('@') {
            Some((login, portal)) => (Some(login), portal),
            None => (None, authority),
        };
        let (user, password) = match login.map(|login| login.split_once('%').unwrap_or((login, ""))) {
            Some(("", _)) => return Err(UrlError("there is no user before the '@'")),
            Some((user, "")) => (Some(user.to_owned()), std::env::var(PASSWORD_VARIABLE).ok()),
            Some((user, password)) => (Some(user.to_owned()), Some(password.to_owned())),
            None => (None, None),
        };
        if user.is_some() && password.is_none() {
            return Err(UrlError("a user needs a password, in the address or in LUNFS_ISCSI_PASSWORD"));
        }
        let (host, port) = match portal.rsplit_once(':') {
            // The last colon of a bare IPv6 address in brackets is no port's.
            Some((_, tail)) if tail.ends_with(']') => (portal, PORT),
            Some((host, port)) => (host, port.parse().map_err(|_| UrlError("the port is no number"))?),
            None => (portal, PORT),
        };
        let lun =
            lun.parse::<u16>().ok().filter(|lun| *lun < 16384).ok_or(UrlError("the LUN is no number"))?;
        let name = unescape(name).ok_or(UrlError("the target's name has a senseless escape"))?;
        let fits = |text: &str| !text.is_empty() && text.len() <= NAME_BYTES_MAX && !text.contains('\0');
        let all = [Some(host), Some(&*name), user.as_deref(), password.as_deref()];
        if !all.into_iter().flatten().all(fits) {
            return Err(UrlError("a part of it is empty or too long"));
        }
        Ok(Target { host: host.to_owned(), port, name, lun, user, password })
    }

    /// As libiscsi wants it.
    pub fn portal(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.portal(), self.name, self.lun)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name of a device as it may be shown and kept: without what logs in, if it is an iSCSI address.
pub fn without_password(spec: &str) -> String {
    match Target::parse(spec) {
        Ok(target) => target.to_string(),
        Err(_) => match (spec.strip_prefix(SCHEME), spec.rfind('@')) {
            (Some(_), Some(at)) => format!("{SCHEME}{}", &spec[at + 1..]),
            _ => spec.to_owned(),
        },
    }
}

/// %xx becomes a byte.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(tail.get(..2)?).ok().filter(|d| !d.starts_with('+'))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(spec: &str) -> Target {
        Target::parse(spec).unwrap_or_else(|e| panic!("{spec}: {e}"))
    }

    #[test]
    fn all_forms() {
        let plain = parse("iscsi://10.0.0.1/iqn.2026-01.org.example:lun/0");
        assert_eq!(
            (&*plain.portal(), &*plain.name, plain.lun),
            ("10.0.0.1:3260", "iqn.2026-01.org.example:lun", 0)
        );
        assert_eq!(plain.user, None);
        let full = parse("iscsi://anna%s3%cret@array.lab:3261/iqn.x%3Ay/7");
        assert_eq!((full.user.as_deref(), full.password.as_deref()), (Some("anna"), Some("s3%cret")));
        assert_eq!((&*full.portal(), &*full.name, full.lun), ("array.lab:3261", "iqn.x:y", 7));
        assert_eq!(parse("iscsi://[fe80::1]/t/1").portal(), "[fe80::1]:3260");
        assert_eq!(parse("iscsi://[fe80::1]:99/t/1").portal(), "[fe80::1]:99");
    }

    #[test]
    fn refusals_and_secrets() {
        for bad in [
            "iscsi://",
            "iscsi://h",
            "iscsi://h/t",
            "iscsi://h/t/x",
            "iscsi://h/t/1/2",
            "iscsi:///t/1",
            "iscsi://h:x/t/1",
            "iscsi://%p@h/t/1",
            "iscsi://h/t%zz/1",
            "iscsi://h/t%+1/1",
            "iscsi://h//1",
            "iscsi://h/t/99999",
            "file:///x",
        ] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(without_password("iscsi://anna%secret@h/t/1"), "iscsi://h:3260/t/1");
        assert_eq!(without_password("iscsi://anna%secret@h/t"), "iscsi://h/t");
        assert_eq!(without_password("/dev/sda"), "/dev/sda");
        assert!(!format!("{:?}", parse("iscsi://anna%secret@h/t/1")).contains("secret"));
    }

    proptest! {
        #[test]
        fn any_text(text in "iscsi://[a-z%@:/\\[\\]0-9é]{0,30}") {
            let shown = without_password(&text);
            if let Ok(target) = Target::parse(&text) {
                prop_assert_eq!(shown, target.to_string());
            }
        }
    }
}
