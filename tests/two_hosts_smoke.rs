//! Two hosts in one process on a simulated LUN, without simulated time.
use lunfs::device::BlockDevice;
use lunfs::device::sim::*;
use lunfs::fs::api::*;
use lunfs::heartbeat::HostIdentity;
use lunfs::rt::HostTag;
use lunfs::volume::*;
use std::sync::Arc;

fn cx() -> OpContext {
    OpContext { uid: 0, gid: 0, pid: 1, may_wait: true, interrupt: None, meant: Default::default() }
}

fn host(name: &str, n: u8) -> HostIdentity {
    HostIdentity {
        name: name.into(),
        uuid: [n; 16],
        boot_id: [9; 16],
        pid: 1,
        pid_namespace: 1,
        is_gone: |_| false,
    }
}

#[test]
fn smoke() {
    let lun = SimLun::new(SimLunOptions { size_bytes: 64 << 20, ..Default::default() });
    let a: Arc<dyn BlockDevice> = lun.attach(HostTag(0));
    let b: Arc<dyn BlockDevice> = lun.attach(HostTag(1));
    lunfs::format::format(&*a, &lunfs::format::FormatOptions::default()).unwrap();
    let opt = |h| MountOptions { host: h, read_only: false, cache_mib: 16, fencing: Default::default() };
    let va = Volume::mount(a, opt(host("a", 1))).unwrap();
    let vb = Volume::mount(b, opt(host("b", 2))).unwrap();
    let (fa, fb) = (va.operations(), vb.operations());
    let root = fa.root();
    let (attr, open) = fa.create(&cx(), root, b"hello", 0o644, libc::O_RDWR).unwrap().value;
    fa.write(&cx(), attr.ino, Some(open.handle), 0, b"hello world", false).unwrap();
    let t = std::time::Instant::now();
    let found = fb.lookup(&cx(), root, b"hello").unwrap().value;
    println!("b lookup took {:?}", t.elapsed());
    assert_eq!(found.size, 11);
    let data = fb.read(&cx(), found.ino, None, 0, 100).unwrap().value;
    assert_eq!(&data[..], b"hello world");
    // big write
    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    fb.write(&cx(), found.ino, None, 5, &big, false).unwrap();
    let got = fa.read(&cx(), found.ino, None, 5, 3_000_000).unwrap().value;
    assert!(got[..] == big[..]);
    // append in turn
    for i in 0..50u8 {
        let f = if i % 2 == 0 { &fa } else { &fb };
        let t = std::time::Instant::now();
        f.write(&cx(), found.ino, None, 0, &[i; 10], true).unwrap();
        if i > 40 {
            println!("append {:?}", t.elapsed());
        }
    }
    let s0 = va.operation_counts();
    for i in 0..2000 {
        drop(fa.create(&cx(), root, format!("f{i}").as_bytes(), 0o644, libc::O_RDWR).unwrap());
    }
    fa.sync(&cx()).unwrap();
    va.store().drain().unwrap();
    println!("2000 creates: {:?}", va.operation_counts().since(&s0));
    let mut n = 0;
    let mut cookie = 0;
    loop {
        let l = fb.readdir(&cx(), root, cookie, 4096, false).unwrap().value;
        if l.is_empty() {
            break;
        }
        cookie = l.last().unwrap().cookie;
        n += l.len();
    }
    assert_eq!(n, 2003);
    fb.mkdir(&cx(), root, b"d1", 0o755).unwrap();
    fa.mkdir(&cx(), root, b"d2", 0o755).unwrap();
    fa.rename(&cx(), root, b"hello", root, b"f7", 0).unwrap();
    assert!(fb.lookup(&cx(), root, b"hello").is_err());
    fb.open(&cx(), attr.ino, libc::O_RDONLY).map(|_| ()).unwrap();
    fa.unlink(&cx(), root, b"f7").unwrap();
    assert!(matches!(fb.lookup(&cx(), root, b"f7"), Err(FsError::NotFound)));
    va.leave().unwrap();
    vb.leave().unwrap();
}
