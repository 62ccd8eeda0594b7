"""Where clients run. Each runtime implements `federated.messages.Runtime`."""
