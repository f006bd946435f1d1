"""What makes many devices and processes one run: meshes, search, hosts, signals."""
