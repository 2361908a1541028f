"""Helpers that every part may use: commands, hosts, clock, metrics, formatting, pages."""
