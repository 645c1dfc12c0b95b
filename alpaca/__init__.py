"""What the commands share, a room for each kind of subject: docs/ARCHITECTURE.md."""
