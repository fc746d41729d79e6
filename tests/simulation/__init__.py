"""A simulated world for the daemon: clock, network, API servers, objects that live and die, faults, and an oracle."""
