"""Report pages: an HTML file about one run or several, which needs no other file.

In the order of the work:

records     the files of a run folder       source      its best checkpoint and its data
findings    neighbours, confusions          pairs       cosines of same and different pairs
learned     a checkpoint and its images     sections    what each method has learned
values      values learned for each class   map, tsne   the embedding in two dimensions
thumbnails  the pictures of a page          explained   a run with all of that
summary     a few sentences about a run     counterpart the same training without its method
results     the table of metrics            curves      the charts of metrics.csv
about       texts about the page's parts    build       the HTML of one run or several
lines       runs as lines of a table        overview    that table: screen, CSV, LaTeX
together    that table as HTML              plots       charts that need no script
document    the HTML file, of page.html, page.css, page.js and the data

Pictures in files of their own are made by evaluation/pictures.py.
"""
