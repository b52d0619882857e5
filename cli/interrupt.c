/* Ctrl-C, as one flag. */
#include "cli/cli.h"

volatile sig_atomic_t choir_cli_interrupted;

static void on_interrupt(int signal_number)
{
    (void)signal_number;
    choir_cli_interrupted = 1;
}

void choir_cli_catch_interrupts(void)
{
    struct sigaction action = {.sa_handler = on_interrupt}; /* no SA_RESTART: reads come back */
    sigaction(SIGINT, &action, NULL);
}

void choir_cli_block_interrupts(bool block)
{
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGINT);
    pthread_sigmask(block ? SIG_BLOCK : SIG_UNBLOCK, &one, NULL);
}
