"""What servers and engines hold in memory: over half an hour, and when everything is compiled."""
