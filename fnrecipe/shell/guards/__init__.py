"""What a run watches for while it trains: spikes, errors of the machine, slow ranks, keys that nothing reads."""
