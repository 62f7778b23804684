"""Tables, HTML, SVG and progress, used by several folders."""
