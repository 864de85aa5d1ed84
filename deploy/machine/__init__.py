"""What both kinds of machine need: keys, environments, the app's package, supervision."""
