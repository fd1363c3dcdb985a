"""Mesh, sharding rules, hosts and processes; what compiled programs cost."""
