//! setfsuid(2), setfsgid(2) and setgroups(2) of one thread: whose rights the file system sees.
#![allow(unsafe_code)] // setgroups of one thread, which the C library only offers for all of them

use std::io;

use nix::unistd::{Gid, Uid, getgroups, setfsgid, setfsuid};

use crate::users::User;

/// While it lives, this thread's file system calls are those of a user, with that user's groups and without root's capabilities
/// over files (capabilities(7)). Dropped, also by a panic, it gives envd's own rights back: blocking threads are used again.
#[derive(Debug)]
pub(super) struct Acting {
    own_groups: Option<Vec<u32>>,
}

impl Acting {
    pub(super) fn begin(user: &User) -> io::Result<Self> {
        if !Uid::effective().is_root() || user.uid == 0 {
            return Ok(Self { own_groups: None });
        }
        let acting = Self {
            own_groups: Some(getgroups()?.into_iter().map(Gid::as_raw).collect()),
        };
        set_groups(&user.groups)?;
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        setfsgid(gid);
        setfsuid(uid);
        // Neither call reports failure; both answer what was before.
        if setfsgid(gid) != gid || setfsuid(uid) != uid {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        if let Some(groups) = &self.own_groups {
            setfsuid(Uid::from_raw(0));
            setfsgid(Gid::from_raw(0));
            if let Err(error) = set_groups(groups) {
                crate::logs::warn(format_args!("groups of a thread: {error}"));
            }
        }
    }
}

fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads as many gid_t, which is u32, as the slice holds.
    let done =
        unsafe { nix::libc::syscall(nix::libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
