"""The front of a real guest: a vfio-user server, by which QEMU has one of our functions as a PCI device."""
