//! Does fsck find what is wrong, name it, repair it, and say so by its exit status?

#[path = "fsck/broken.rs"]
mod broken;
#[path = "fsck/cases.rs"]
mod cases;
#[path = "fsck/command.rs"]
mod command;
#[path = "fsck/garbage.rs"]
mod garbage;
#[path = "fsck/maintenance.rs"]
mod maintenance;
#[path = "fsck/progress.rs"]
mod progress;
#[path = "fsck/repairs.rs"]
mod repairs;
mod volumes;
