"""One metric per file; the columns that they are in the table are listed in `registry`."""
