#include "tune/out_folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

choir_status choir_tune_out_folder_check(const char *path)
{
    struct stat there;
    if (lstat(path, &there) != 0) return CHOIR_OK;
    return choir_fail(CHOIR_E_EXISTS, "%s is there already; remove it or name another", path);
}

/* The folder is ours and flat; a link of that name is not followed. */
static void remove_folder(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *folder = fd < 0 ? NULL : fdopendir(fd);
    if (folder == NULL) {
        if (fd >= 0) close(fd);
        return;
    }
    const struct dirent *entry;
    while ((entry = readdir(folder)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            unlinkat(dirfd(folder), entry->d_name, 0);
    closedir(folder);
    rmdir(path);
}

choir_status choir_tune_out_folder_begin(const char *path, choir_tune_out_folder *out)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    out->path = path;
    if ((size_t)snprintf(out->temporary, sizeof out->temporary, "%.*s.tmp-%ld", (int)n, path,
                         (long)getpid()) >= sizeof out->temporary)
        return choir_fail(CHOIR_E_INVALID, "a folder's name of %zu bytes, the limit is 3900", n);
    /* A killed process of this number may have left its folder, with other files. */
    remove_folder(out->temporary);
    return choir_folder_make(out->temporary);
}

choir_status choir_tune_out_folder_commit(const choir_tune_out_folder *folder)
{
    /* rename() would replace an empty folder that came meanwhile, and nothing else. */
    if (rename(folder->temporary, folder->path) != 0)
        return choir_fail(errno == EEXIST || errno == ENOTEMPTY ? CHOIR_E_EXISTS : CHOIR_E_IO,
                          "cannot name the new folder %s: %m", folder->path);
    return choir_folder_sync(folder->path);
}

void choir_tune_out_folder_abandon(const choir_tune_out_folder *folder)
{
    remove_folder(folder->temporary);
}
