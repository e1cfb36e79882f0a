"""An index as a local web page: drop a picture, see what is nearest to it.

pictures   what a browser sends → pixels; what the index holds → thumbnails
gallery    the index as it is on disk now, its network, and one search at a time
api        what the page asks for, as plain dictionaries
guards     which requests are answered at all
handler    HTTP: one request → one answer
server     the address, the threads, the end

The page is page.html, page.css and page.js; it loads nothing from elsewhere.
"""
