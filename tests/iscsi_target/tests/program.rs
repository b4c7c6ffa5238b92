//! The program: one command starts a target or a proxy, and its control socket does what the library does.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use lunfs_test_target::control;
use lunfs_test_target::initiator::Login;
use serde_json::{Value, json};

struct Program {
    child: Child,
    ready: String,
    control: PathBuf,
    _directory: tempfile::TempDir,
}

impl Program {
    fn start(arguments: &[&str]) -> Program {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("control");
        let mut child = Command::new(env!("CARGO_BIN_EXE_lunfs-test-target"))
            .args(arguments)
            .arg("--control")
            .arg(&control)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready = line.trim().strip_prefix("ready ").unwrap().to_owned();
        let began = std::time::Instant::now();
        while !control.exists() && began.elapsed().as_secs() < 10 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Program { child, ready, control, _directory: directory }
    }

    fn ask(&self, request: Value) -> Value {
        let answer = control::ask(&self.control, &request).unwrap();
        assert!(answer.get("error").is_none(), "{request}: {answer}");
        answer["ok"].clone()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_target_by_one_command() {
    let program = Program::start(&[
        "serve",
        "--size",
        "16M",
        "--luns",
        "2",
        "--personality",
        r#"{"volatile_cache":true}"#,
    ]);
    let rest = program.ready.strip_prefix("iscsi://").unwrap();
    let (portal, rest) = rest.split_once('/').unwrap();
    let (name, lun) = rest.split_once('/').unwrap();
    assert_eq!(lun, "1");
    let login = Login::at(portal.parse::<SocketAddr>().unwrap(), name, "a");
    let mut a = login.ready().unwrap();
    let rule =
        json!({"id": "x", "select": {"kind": "compare_and_write", "nth": 1}, "fault": {"do": "lose_answer"}});
    assert_eq!(program.ask(json!({"op": "rule", "rule": rule})), "x");
    a.send_compare_and_write(4, &[0; 512], &[1; 512]).unwrap();
    assert!(a.hears_nothing_for(300).unwrap());
    assert_eq!(program.ask(json!({"op": "rules"}))[0]["fired"], 1);
    let read = program.ask(json!({"op": "read", "lba": 4}));
    assert_eq!(read.as_str().unwrap(), format!("0x{}", "01".repeat(512)));
    let trace = program.ask(json!({"op": "trace"}));
    let last = trace.as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["name"], &last["fault"], &last["changed"]),
        (&json!("COMPARE AND WRITE"), &json!("x"), &json!(true))
    );
    let status = program.ask(json!({"op": "status"}));
    assert_eq!(
        (status["luns"][0]["not_durable"].as_u64(), status["luns"].as_array().unwrap().len()),
        (Some(1), 2)
    );
    program.ask(json!({"op": "set", "fields": {"compare_and_write": "unsupported"}}));
    assert_eq!(a.compare_and_write(4, &[1; 512], &[2; 512]).unwrap().check(), Some((5, 0x20, 0)));
    program.ask(json!({"op": "freeze"}));
    a.send(&[0; 6], &[], 0).unwrap();
    assert!(a.hears_nothing_for(300).unwrap());
    program.ask(json!({"op": "thaw"}));
    assert_eq!(program.ask(json!({"op": "unmap_lun", "lun": 2})), true);
    assert_eq!(program.ask(json!({"op": "map_lun", "lun": 2})), true);
    assert_eq!(program.ask(json!({"op": "lose_power", "seed": 3}))["at_risk"], 1);
    let wrong = control::ask(&program.control, &json!({"op": "set", "fields": {"no_such": 1}})).unwrap();
    assert!(wrong["error"].as_str().unwrap().contains("no_such"), "{wrong}");
    assert!(control::ask(&program.control, &json!({"op": "nonsense"})).unwrap()["error"].is_string());
}

#[test]
fn a_proxy_by_one_command_and_an_end_by_request() {
    let target = Program::start(&["serve", "--size", "16M"]);
    let (portal, name) = target.ready.strip_prefix("iscsi://").unwrap().split_once('/').unwrap();
    let rule = r#"{"id":"r","select":{"kind":"compare_and_write","nth":2},"fault":{"do":"cut_after"}}"#;
    let mut proxy = Program::start(&["proxy", "--to", portal, "--rule", rule]);
    let login = Login::at(proxy.ready.parse().unwrap(), name.split_once('/').unwrap().0, "a");
    let mut a = login.ready().unwrap();
    assert!(a.compare_and_write(4, &[0; 512], &[1; 512]).unwrap().is_good());
    assert!(a.compare_and_write(4, &[1; 512], &[2; 512]).is_err());
    assert_eq!(login.ready().unwrap().read(4, 1, 512).unwrap().data, [2; 512]);
    assert_eq!(proxy.ask(json!({"op": "rules"}))[0]["fired"], 1);
    proxy.ask(json!({"op": "stop"}));
    assert!(proxy.child.wait().unwrap().success());
    assert!(!proxy.control.exists());
}
