"""An output is whole or not there: staged, journaled and published."""
