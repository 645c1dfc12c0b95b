"""How the embedded tiny model and the demo corpus are made. No command needs it."""
