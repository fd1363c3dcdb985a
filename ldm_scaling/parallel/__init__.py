"""Mesh, sharding rules, hosts."""
