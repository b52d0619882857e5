/* Manual pages, out of the same tables as --help. */
#include "cli/cli.h"

#include <stdio.h>

/* Text in roff: a leading dot or quote and every backslash and dash are escaped. */
static void put_text(const char *text, FILE *to)
{
    if (*text == '.' || *text == '\'') fputs("\\&", to);
    for (; *text != '\0'; text++) {
        if (*text == '\\')
            fputs("\\e", to);
        else if (*text == '-')
            fputs("\\-", to);
        else
            fputc(*text, to);
    }
}

static void put_option(const choir_option *o, FILE *to)
{
    fputs(".TP\n.B ", to);
    if (o->letter != 0) fprintf(to, "\\-%c, ", o->letter);
    fputs("\\-\\-", to);
    put_text(o->name, to);
    if (o->value != NULL) {
        fputs(" \\fI", to);
        put_text(o->value, to);
        fputs("\\fR", to);
    }
    fputc('\n', to);
    put_text(o->help, to);
    fputc('\n', to);
}

void choir_cli_print_man(const choir_verb *v, FILE *to)
{
    fprintf(to, ".TH CHOIR\\-%s 1 \"\" \"choir %s\" \"User Commands\"\n", v->name, CHOIR_VERSION);
    fprintf(to, ".SH NAME\nchoir\\-%s \\- ", v->name);
    put_text(v->summary, to);
    fprintf(to, "\n.SH SYNOPSIS\n.B choir %s\n", v->name);
    put_text(v->arguments, to);
    fputs("\n.SH OPTIONS\n", to);
    for (uint32_t i = 0; i < v->n_options; i++) put_option(&v->options[i], to);
    fputs(".SH EXAMPLE\n.nf\n", to);
    put_text(v->example, to);
    fputs("\n.fi\n.SH EXIT STATUS\n0: done; 1: failed, with one sentence on the standard error; 2: "
          "wrong usage.\n.SH SEE ALSO\n.BR choir (1)\n",
          to);
}
