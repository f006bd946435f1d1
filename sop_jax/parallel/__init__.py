"""Many devices and processes as one run: meshes, search, hosts and signals."""
