"""What keeps a step small."""
