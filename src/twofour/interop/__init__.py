"""Other libraries' formats, one neighbour per file; import the file you need."""
