"""Devices, hosts and signals: what makes many one."""
