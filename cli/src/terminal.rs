//! The user's own terminal: raw while a program in a sandbox has it, and how large it is.
#![allow(unsafe_code)] // ioctl

use std::{
    io::{self, Stdin},
    os::fd::AsRawFd as _,
};

use nix::{
    pty::Winsize,
    sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
};
use proto::envd::v1::TerminalSize;

nix::ioctl_read_bad!(get_size, nix::libc::TIOCGWINSZ, Winsize);

const USUAL: TerminalSize = TerminalSize { rows: 24, cols: 80 };

/// Keys go through as they are, until it is dropped.
#[derive(Debug)]
pub(crate) struct Raw {
    stdin: Stdin,
    before: Termios,
}

impl Raw {
    /// Makes the terminal that is stdin raw.
    pub(crate) fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSADRAIN, &raw)?;
        Ok(Self { stdin, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(&self.stdin, SetArg::TCSADRAIN, &self.before);
    }
}

/// How large the terminal is; a usual size if it does not say.
pub(crate) fn size() -> TerminalSize {
    let mut size = Winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: stdin's descriptor is a number that is open or is refused, and the size outlives the call.
    let known = unsafe { get_size(io::stdin().as_raw_fd(), &raw mut size) };
    if known.is_err() || size.ws_row == 0 || size.ws_col == 0 {
        return USUAL;
    }
    TerminalSize {
        rows: u32::from(size.ws_row).min(4096),
        cols: u32::from(size.ws_col).min(4096),
    }
}
