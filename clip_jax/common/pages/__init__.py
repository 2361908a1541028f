"""Pages that show what was found: one file each, readable offline, on a phone, in light or dark."""
