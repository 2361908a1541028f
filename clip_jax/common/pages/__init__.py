"""HTML reports: one file each, readable offline, on a phone, in light or dark."""
