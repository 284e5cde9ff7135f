"""The modules: they hold parameters and know tensors, not builders. Each is written once for any number of axes."""
