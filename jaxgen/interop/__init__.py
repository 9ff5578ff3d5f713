"""Files in other libraries' formats, and their weights."""
