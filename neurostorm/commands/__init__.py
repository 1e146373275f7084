"""The commands of `neurostorm`, and how a command line becomes a configuration."""
