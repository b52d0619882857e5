choir_fuzz(request_fuzz SOURCES request_fuzz.c LINKS choir_server)
