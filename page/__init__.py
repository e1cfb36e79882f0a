"""Report pages: from run folders to one HTML file that needs nothing else.

records    a run folder, read            overview   many runs in a table
findings   what an evaluation shows      methods    what each method learned, made visible
Pictures of images are in evaluation/pictures.py; document puts it all into page.html, page.css and
page.js.
"""
