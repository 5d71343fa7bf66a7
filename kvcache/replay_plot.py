"""Pictures of a replay, with matplotlib."""
