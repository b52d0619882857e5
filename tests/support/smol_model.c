#include "tests/support/smol_model.h"

#include "base/base.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

const char *smol_model(void)
{
    static char path[4096];
    const char *named = getenv("CHOIR_TEST_MODEL"), *cache = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME"), *in_home = "";
    if (cache == NULL) {
        cache = home != NULL ? home : "";
        in_home = "/.cache";
    }
    if (named != NULL)
        snprintf(path, sizeof path, "%s", named);
    else
        snprintf(path, sizeof path, "%s%s/choir/models/SmolLM2-135M-Instruct.Q4_1.gguf", cache,
                 in_home);
    if (!choir_file_exists(path)) {
        print_message("skipped: no %s; scripts/get-model puts it there\n", path);
        skip();
    }
    return path;
}
