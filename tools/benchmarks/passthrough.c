/* A FUSE file system of one file that passes everything on to a backing file: what FUSE itself costs in C.
 *
 *     passthrough BACKING DIRECTORY        serves DIRECTORY/disk.img in the foreground until SIGTERM
 *
 * libfuse's low-level API, a thread for each core, each with a descriptor of its own. Like the other peers it writes to the
 * page cache and makes durable what fsync asks for: FSYNC is fdatasync, FALLOCATE punches or zeroes. Requests of 1 MiB,
 * as many of them under way and the same flags of the open file (direct I/O, writes in parallel) as asrfs has.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DISK_NODE 2
#define DISK_NAME "disk.img"
#define REQUEST_BYTES_MAX (1u << 20)
#define THREADS_MIN 2
#define BACKGROUND_MAX 128
#define CONGESTION_AT 96

static int backing;
static _Thread_local char *read_buffer;

static int attributes(fuse_ino_t node, struct stat *found)
{
	memset(found, 0, sizeof(*found));
	if (node == FUSE_ROOT_ID) {
		found->st_mode = S_IFDIR | 0700;
		found->st_nlink = 2;
	} else if (fstat(backing, found) == 0) {
		found->st_mode = S_IFREG | 0600;
		found->st_nlink = 1;
	} else {
		return errno;
	}
	found->st_ino = node;
	return 0;
}

static void on_init(void *context, struct fuse_conn_info *connection)
{
	(void)context;
	connection->max_write = REQUEST_BYTES_MAX;
	connection->max_read = 0; /* no other bound than the kernel's */
	connection->max_readahead = REQUEST_BYTES_MAX;
	connection->max_background = BACKGROUND_MAX;
	connection->congestion_threshold = CONGESTION_AT;
	connection->want |= connection->capable & FUSE_CAP_ASYNC_DIO;
	connection->want &= ~(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {.ino = DISK_NODE, .attr_timeout = 1.0, .entry_timeout = 1.0};
	int error = parent == FUSE_ROOT_ID && strcmp(name, DISK_NAME) == 0 ? attributes(DISK_NODE, &entry.attr) : ENOENT;

	if (error)
		fuse_reply_err(request, error);
	else
		fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
	struct stat found;
	int error = attributes(node, &found);

	(void)file;
	if (error)
		fuse_reply_err(request, error);
	else
		fuse_reply_attr(request, &found, 1.0);
}

static void on_setattr(fuse_req_t request, fuse_ino_t node, struct stat *wanted, int what, struct fuse_file_info *file)
{
	(void)wanted;
	(void)what; /* like a block device: it keeps its size */
	on_getattr(request, node, file);
}

static void on_open(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
	/* By hand, because this libfuse has no name for writes in parallel. */
	struct fuse_open_out opened = {.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES};

	(void)file;
	if (node == DISK_NODE)
		fuse_reply_buf(request, (const char *)&opened, sizeof(opened));
	else
		fuse_reply_err(request, EISDIR);
}

static void on_read(fuse_req_t request, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *file)
{
	ssize_t length;

	(void)node;
	(void)file;
	if (size > REQUEST_BYTES_MAX)
		size = REQUEST_BYTES_MAX;
	if (!read_buffer && !(read_buffer = malloc(REQUEST_BYTES_MAX))) {
		fuse_reply_err(request, ENOMEM);
		return;
	}
	length = pread(backing, read_buffer, size, offset);
	if (length < 0)
		fuse_reply_err(request, errno);
	else
		fuse_reply_buf(request, read_buffer, length);
}

static void on_write(fuse_req_t request, fuse_ino_t node, const char *bytes, size_t size, off_t offset,
		     struct fuse_file_info *file)
{
	ssize_t length = pwrite(backing, bytes, size, offset);

	(void)node;
	(void)file;
	if (length < 0)
		fuse_reply_err(request, errno);
	else
		fuse_reply_write(request, length);
}

static void on_fsync(fuse_req_t request, fuse_ino_t node, int only_data, struct fuse_file_info *file)
{
	(void)node;
	(void)only_data;
	(void)file;
	fuse_reply_err(request, fdatasync(backing) ? errno : 0);
}

static void on_fallocate(fuse_req_t request, fuse_ino_t node, int mode, off_t offset, off_t length,
			 struct fuse_file_info *file)
{
	(void)node;
	(void)file;
	fuse_reply_err(request, fallocate(backing, mode | FALLOC_FL_KEEP_SIZE, offset, length) ? errno : 0);
}

static void on_flush(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
	(void)node;
	(void)file;
	fuse_reply_err(request, 0);
}

static void on_statfs(fuse_req_t request, fuse_ino_t node)
{
	struct statvfs found;

	(void)node;
	if (fstatvfs(backing, &found))
		fuse_reply_err(request, errno);
	else
		fuse_reply_statfs(request, &found);
}

static const struct fuse_lowlevel_ops operations = {
	.init = on_init,
	.lookup = on_lookup,
	.getattr = on_getattr,
	.setattr = on_setattr,
	.open = on_open,
	.read = on_read,
	.write = on_write,
	.flush = on_flush,
	.fsync = on_fsync,
	.fallocate = on_fallocate,
	.statfs = on_statfs,
};

static int serve(struct fuse_session *session, const char *directory)
{
	struct fuse_loop_config *config = fuse_loop_cfg_create();
	long cores = sysconf(_SC_NPROCESSORS_ONLN);
	int result;

	if (!config || fuse_set_signal_handlers(session) || fuse_session_mount(session, directory))
		return 1;
	fuse_loop_cfg_set_clone_fd(config, 1);
	fuse_loop_cfg_set_max_threads(config, cores > THREADS_MIN ? cores : THREADS_MIN); /* more were slower */
	result = fuse_session_loop_mt(session, config);
	fuse_session_unmount(session);
	fuse_remove_signal_handlers(session);
	fuse_loop_cfg_destroy(config);
	return result < 0;
}

int main(int count, char *words[])
{
	char *options[] = {words[0], "-o", "fsname=passthrough,default_permissions", NULL};
	struct fuse_args arguments = FUSE_ARGS_INIT(3, options);
	struct fuse_session *session;
	int result;

	if (count != 3) {
		fprintf(stderr, "usage: passthrough BACKING DIRECTORY\n");
		return 2;
	}
	backing = open(words[1], O_RDWR | O_CLOEXEC);
	if (backing < 0) {
		perror(words[1]);
		return 1;
	}
	session = fuse_session_new(&arguments, &operations, sizeof(operations), NULL);
	if (!session)
		return 1;
	result = serve(session, words[2]);
	fuse_session_destroy(session);
	fuse_opt_free_args(&arguments);
	return result;
}
