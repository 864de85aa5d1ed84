"""Images and tables as hospitals have them."""
