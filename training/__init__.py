"""Training of IP-Adapters; imports `ip_adapter_core`, never the nodes or the host."""
