"""Report pages: from run folders to one HTML file that needs nothing else.

In the order of the work:

records     a run folder, read back         source      its best checkpoint and data, opened
findings    what an evaluation shows        pairs       two images: one class or two
learned     a run's checkpoint and images   sections    what each method learned, made visible
values      what was learned for a class    map, tsne   the embedding in the plane
thumbnails  the pictures that it shows      explained   a run with all of that
summary     what is said of it in a few sentences
results     the table of its metrics        curves      metrics.csv as charts
counterpart the same training without it    about       what is said of the page's parts
build       the HTML of one run or several
lines       many runs as lines of a table   overview    that table: screen, CSV, LaTeX
together    the HTML of it                  plots       its charts
document    the HTML file: page.html, page.css, page.js and the data in one

Pictures that are files of their own are made by evaluation/pictures.py.
"""
