/* check.c - every invariant, from outside, and nobody waits for it longer than a slice.
 *
 * What a record says of itself is judged without any lock (check_records.c).  A view that stood
 * still is one moment of the record, nothing current is overwritten, and descriptors, watermarks
 * and next_id are single words stored in the right order.  So a fault seen there is a fault.
 *
 * What two places say of each other can be proved wrong only while neither moves, that is, with the
 * lock that protects both.  But a fault stays: nobody repairs it in passing.  So whatever is seen
 * in order once, without a lock, is in order, and the lock is for the rest:
 *
 *   suspects   A record that an index does not lead to, an entry that leads to no domain, an extent
 *              that is not marked as used (check_records.c).  Each is looked at a few times.  Those
 *              that never look right are judged one by one with the lock held, a microsecond each,
 *              as many as there is time for; then the lock is released, and taken again.
 *   cells      That a cell is named twice, or marked and nobody's, is seen by walking all
 *              descriptors (check_sums.c).  A cell that moves from record to record during the walk
 *              may seem to be either, but hardly in every walk: what no walk has acquitted is
 *              judged by one more with the heap lock held.
 *   sums       Numbers that must be equal: entries and domains, free slots, used cells
 *              (check_sums.c).  They are taken without a lock first, between two looks at the
 *              sequence (the turn of the heap).  If nothing moved, that is the verdict; else they
 *              are taken with the lock held.
 *
 * A lock is held for SD_CHECK_HOLD_NS at most.  What takes longer - a free list of half a million
 * slots, or walking the descriptors of several million domains that do have a fault, and both only
 * while writers never rest - gets no verdict instead of a wrong one.
 *
 * Nothing here stores into the segment; a checker that dies leaves nothing but the lock it held.
 */
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

const char *const SD_INDEX_NAMES[SD_INDEXES] = {"UUID", "name", "id"};

static const int PART_OF_SUM[SD_SUMS] = {
    [SD_SUM_LISTED] = SD_PART_LIST, [SD_SUM_FREE] = SD_PART_LIST, [SD_SUM_IDS] = SD_PART_IDS,
    [SD_SUM_USED] = SD_PART_HEAP,   [SD_SUM_CELLS] = SD_PART_HEAP,
};

void sd_fault(const sd_check *check, const char *invariant, const char *format, ...)
{
    char text[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    check->emit(check->emit_context, invariant, text);
}

static void doubt(void *doubts, const char *invariant, const char *what)
{
    (void)invariant, (void)what;
    ++*(unsigned *)doubts;
}

void sd_check_listen(sd_check *check)
{
    check->doubts = 0;
    check->emit = doubt;
    check->emit_context = &check->doubts;
}

void sd_check_speak(sd_check *check)
{
    check->emit = check->report;
    check->emit_context = check->context;
}

sd_check *sd_check_begin(sd_segment *segment, unsigned states, sd_report report, void *context)
{
    sd_check *check = calloc(1, sizeof *check);
    if (!check) return NULL;
    check->segment = segment;
    check->states = states;
    check->report = report;
    check->context = context;
    check->mask = UINT64_MAX;
    for (int sum = 0; sum < SD_SUMS; sum++) check->sum[sum].stage = -1;
    for (int part = 0; part < SD_PARTS; part++) {
        check->suspects[part] = malloc(SD_SUSPECTS_MAX * sizeof(sd_suspect));
        if (check->suspects[part]) continue;
        sd_check_end(check);
        return NULL;
    }
    sd_check_speak(check);
    return check;
}

void sd_check_end(sd_check *check)
{
    if (!check) return;
    for (int part = 0; part < SD_PARTS; part++) free(check->suspects[part]);
    free(check->named), free(check->again), free(check->ownerless), free(check->twice);
    free(check);
}

const sd_tally *sd_check_tally(const sd_check *check)
{
    return &check->tally;
}

uint32_t sd_check_suspects(const sd_check *check, int part)
{
    return check->suspected[part];
}

uint64_t sd_check_overlooked(const sd_check *check)
{
    return check->overlooked;
}

int sd_check_part(int sum)
{
    return PART_OF_SUM[sum];
}
