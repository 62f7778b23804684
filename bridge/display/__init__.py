"""Tables, HTML and SVG that several rooms print."""
