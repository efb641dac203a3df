"""A guest for QEMU out of Debian's packages: kernel, initramfs, emulator (docs/decisions/0028)."""
