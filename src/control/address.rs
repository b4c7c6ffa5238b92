//! Sockets by path, however long the path is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The address of a socket is at most 107 bytes long; a path below a descriptor of its directory always fits.
pub fn in_its_directory<T>(path: &Path, then: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let directory = File::open(parent)?;
    then(&Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name))
}
