use std::borrow::Cow;

use template_svc::kernel::{KernelError, LARGEST_KERNEL, release, vmlinux};

use crate::made::{Kernel, RELEASE, bzimage, gzip, lz4, sized, xz, zstd};

/// Large enough for several blocks of each way to pack.
fn kernel() -> Vec<u8> {
    let mut kernel = Kernel::default().make();
    let more = (0_u32..9 << 18).flat_map(|number| (number >> 4).to_le_bytes());
    kernel.extend(more);
    kernel
}

fn packed(kernel: &[u8]) -> [Vec<u8>; 4] {
    let size = kernel.len();
    [
        gzip(kernel),
        sized(xz(kernel), size),
        sized(zstd(kernel), size),
        sized(lz4(kernel), size),
    ]
}

#[test]
fn a_kernel_comes_out_of_its_image_however_it_is_packed() {
    let kernel = kernel();
    for payload in packed(&kernel) {
        let image = bzimage(&payload);
        assert!(vmlinux(&image).unwrap() == kernel);
    }
    assert!(matches!(vmlinux(&kernel).unwrap(), Cow::Borrowed(_)));
    assert_eq!(release(&kernel).unwrap(), RELEASE);
}

#[test]
fn what_is_cut_short_is_refused() {
    let kernel = Kernel::default().make();
    for payload in packed(&kernel) {
        let image = bzimage(&payload);
        let whole = image.len() - 100;
        for end in 0..whole {
            assert!(vmlinux(&image[..end]).is_err(), "{end} of {whole}");
        }
    }
    // As is a kernel, of which at least its banner is gone then.
    for end in 0..kernel.len() {
        assert!(release(&kernel[..end]).is_err(), "{end}");
    }
}

#[test]
fn damage_is_never_a_panic() {
    let kernel = Kernel::default().make();
    for payload in packed(&kernel) {
        let image = bzimage(&payload);
        let header = 0x1f0..0x250;
        let body = 3 * 512 + 0x2cc..image.len() - 100;
        for at in header.chain(body) {
            for change in [0x01, 0x80, 0xff] {
                let mut image = image.clone();
                image[at] ^= change;
                // Some of it is nobody's, and some is a length that fits by chance.
                if let Ok(kernel) = vmlinux(&image) {
                    drop(release(&kernel));
                }
            }
        }
    }
    for at in 0..kernel.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut kernel = kernel.clone();
            kernel[at] ^= change;
            drop(release(&kernel));
        }
    }
}

#[test]
fn headers_that_say_what_cannot_be_are_refused() {
    let kernel = Kernel::default().make();
    let image = bzimage(&gzip(&kernel));
    let with = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        vmlinux(&image).map(drop).unwrap_err()
    };
    assert!(matches!(with(0x202, b"HdrX"), KernelError::NotAKernel));
    let old = with(0x206, &0x0207_u16.to_le_bytes());
    assert_eq!(
        old.to_string(),
        "the bzImage has boot protocol 2.7, 2.08 or newer is needed"
    );
    for at in [0x248, 0x24c] {
        let error = with(at, &u32::MAX.to_le_bytes());
        assert!(matches!(error, KernelError::Image(_)), "{error}");
    }
    assert!(matches!(with(0x24c, &[0; 4]), KernelError::Image(_)));
    // lzma and bzip2, as kernels may be packed, too.
    for magic in [&b"\x5d\0\0\0"[..], b"BZh9"] {
        let image = bzimage(&sized([magic, &[0; 100]].concat(), 1));
        let error = vmlinux(&image).unwrap_err();
        assert!(matches!(error, KernelError::Compression), "{error}");
    }
    let text = sized(zstd(b"no kernel"), 9);
    let error = vmlinux(&bzimage(&text)).unwrap_err();
    assert!(matches!(error, KernelError::Image(_)), "{error}");
    let error = vmlinux(b"#!/bin/sh\n").unwrap_err();
    assert!(matches!(error, KernelError::NotAKernel), "{error}");
}

/// What says that it is small is not unpacked further than that, and what says that it is large not at all.
#[test]
fn bombs_are_refused() {
    let zeros = vec![0; 64 << 20];
    let bombs = [xz(&zeros), zstd(&zeros), lz4(&zeros)];
    for bomb in bombs {
        let error = vmlinux(&bzimage(&sized(bomb.clone(), 1 << 20))).unwrap_err();
        assert!(matches!(error, KernelError::Image(_)), "{error}");
        let large = usize::try_from(LARGEST_KERNEL).unwrap() + 1;
        let error = vmlinux(&bzimage(&sized(bomb, large))).unwrap_err();
        assert!(matches!(error, KernelError::TooLarge { .. }), "{error}");
    }
}

#[test]
fn a_kernel_that_guests_cannot_boot_is_told_why() {
    let refused = |kernel: Kernel| release(&kernel.make()).unwrap_err().to_string();
    let like = Kernel::default;
    let aarch64 = Kernel {
        machine: 183,
        ..like()
    };
    assert!(refused(aarch64).contains("for another CPU"));
    let library = Kernel { kind: 3, ..like() };
    assert!(refused(library).contains("no executable"));
    for note in [
        (b"Xen\0", 17, like().note.2),
        (b"GNU\0", 18, like().note.2),
        (b"Xen\0", 18, vec![1; 3]),
        // Where nothing is loaded.
        (b"Xen\0", 18, vec![0; 8]),
        (b"Xen\0", 18, vec![0xff; 8]),
    ] {
        assert!(refused(Kernel { note, ..like() }).contains("CONFIG_PVH=y"));
    }
    // 32-bit kernels' builds have four bytes.
    let narrow = Kernel {
        note: (b"Xen\0", 18, 0x0100_0100_u32.to_le_bytes().to_vec()),
        ..like()
    };
    assert_eq!(release(&narrow.make()).unwrap(), RELEASE);
    for text in [
        String::new(),
        "Linux version ".into(),
        "Linux version 6.1".into(),
        "Linux version x6.1 (me)".into(),
        "Linux version 6.1\u{7} (me)".into(),
        format!("Linux version 6{} (me)", "x".repeat(64)),
    ] {
        assert!(refused(Kernel { text, ..like() }).contains("does not say its version"));
    }
}
