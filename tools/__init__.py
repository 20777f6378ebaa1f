"""What the project needs to run itself: the host, a server, stand-in models, the demo."""
