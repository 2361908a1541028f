"""Helpers that every part may use: commands, hosts, time, metrics, tables, pages."""
