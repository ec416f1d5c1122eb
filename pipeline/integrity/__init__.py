"""What stored bytes should be and whether they still are: record, manifest and verify."""
