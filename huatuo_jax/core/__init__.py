"""Files, configs, command line, processes, sharding: the ground that all rooms stand on."""
