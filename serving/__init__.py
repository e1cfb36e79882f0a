"""An index as a local web page: drop a picture, see those nearest to it.

pictures   decodes pictures from the browser, makes thumbnails of those in the index
gallery    the index as it is on disk, its network, and one search at a time
api        the data of the page, as plain dictionaries
guards     refuses requests of other sites, and those that are too large
handler    HTTP: reads a request and sends an answer
server     the address, the threads, starting and stopping

The page is page.html, page.css and page.js; it loads nothing from elsewhere.
"""
