"""Small stories: one page or two, a device, a vCPU and one change, of which every schedule matters."""
