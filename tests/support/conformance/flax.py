def ranked(): return []
